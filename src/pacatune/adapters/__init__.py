"""Everything done to a finished adapter: check, inspect, compare, merge, export, generate."""
