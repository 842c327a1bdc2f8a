"""What `gpu_suite` measures, one module a section, and what the sections share."""
