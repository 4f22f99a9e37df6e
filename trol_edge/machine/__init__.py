"""What machine this is, what it can do by the table, and what its sensors say."""
