"""What a person reads after a build: `report.json` (schema), and the same as tables in a terminal."""
