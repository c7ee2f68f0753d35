"""The models: configurations, stems, encoder, and what is counted, saved and applied of them."""
