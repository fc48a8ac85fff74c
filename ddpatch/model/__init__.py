"""Networks. Nothing here knows about ranks."""
