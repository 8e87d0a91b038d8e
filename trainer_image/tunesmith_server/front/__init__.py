"""The one way in to every engine: requests are checked, bounded and counted here before an engine sees them."""
