"""Results until their validator has answered."""
