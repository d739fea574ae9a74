"""What fastmbconv is compared with, and how: see NOTES.md for floors and findings, results/ for figures."""
