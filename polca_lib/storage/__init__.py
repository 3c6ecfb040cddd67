"""What lies on disk: results that know what they were made from, arrays in pieces, checkpoints."""
