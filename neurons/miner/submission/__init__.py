"""Results until their validator has answered: ``spool`` keeps them, ``submitter`` sends them, ``outcomes`` judges."""
