"""What coordinator and hospital must agree on. Imports neither of them."""
