"""What is written down: the database, and what lies beside the data in case it is lost."""
