"""The coordinator's two HTTP interfaces: one for hospitals, one for those who run the federation."""
