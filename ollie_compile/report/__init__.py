"""What was decided for each operator and why, as text, JSON and one HTML page."""
