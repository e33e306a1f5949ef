"""What `noid bench` runs: noid's figures, each beside the raw floor measured in the same run on the same machine."""
