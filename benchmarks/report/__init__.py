"""What committed results say: the tables and pictures of docs/performance.md, and comparisons."""
