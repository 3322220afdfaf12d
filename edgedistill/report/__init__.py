"""What a build says of itself: report.json, Markdown, HTML, the terminal table."""
