"""Many rows, many evaluations and slow servers: time and memory stay bounded."""
