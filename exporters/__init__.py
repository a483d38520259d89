"""Writers of deployable model files."""
