"""Models of the tables: networks of papers, the zoo, trained upscalers, and language models."""
