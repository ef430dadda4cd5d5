"""Results until their validator has answered: ``spool`` keeps them on disk, ``submitter`` sends them."""
