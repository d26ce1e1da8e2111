"""`lowmem bench`: what a form of a model costs, in output quality and in time, against bf16."""
