"""Being in a guest: processes, their logs, the console, files, connections, and who it is told to be."""
