"""The report: the decision for each operator and its reason, as text, JSON and one HTML page."""
