"""VMs: the tables that make, move and end them, and the machines that run."""
