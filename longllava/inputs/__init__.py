"""From what a person gives (text, pictures, videos) to token ids and pixels. Knows no model, no data."""
