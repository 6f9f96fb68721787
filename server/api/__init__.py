"""The coordinator's two HTTP interfaces: one for hospitals, one for its operators."""
