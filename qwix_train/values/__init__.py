"""What travels through a traced function in the place of an array."""
