"""`slap-ds bench`: what this machine, or these machines, reach."""
