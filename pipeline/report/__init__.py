"""A masks dataset as one HTML page to look at: `tally` counts, `pictures` draws, `page` writes."""
