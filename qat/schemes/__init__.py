"""Which tensor gets which format: specs, presets, the configuration of a checkpoint, mapping files."""
