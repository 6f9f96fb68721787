"""Many hospitals on one machine: the same study, client functions and server rules."""
