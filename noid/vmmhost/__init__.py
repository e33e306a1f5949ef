"""What VMM plugins share: a VMM as a process that outlives noid, and a serial line as files."""
