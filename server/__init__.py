"""What runs at the coordinator. It never sees a patient's record."""
