"""The decoder as functions: layouts, norms, rotary, attention, feed-forward."""
