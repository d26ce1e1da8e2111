"""`lowmem doctor`: checks what works on this machine by running it."""
