"""`lowmem doctor`: what works on this machine, tried and not assumed."""
