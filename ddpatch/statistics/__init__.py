"""What a turbulence scientist measures, on files of any size, and the report."""
