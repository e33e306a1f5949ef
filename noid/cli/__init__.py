"""The command line: parses, calls the client, prints. Every command's module is imported only when it runs."""
