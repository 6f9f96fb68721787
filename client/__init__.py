"""What runs at a hospital, beside its data. Raw records stop here."""
