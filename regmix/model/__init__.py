"""The model that proxies and the large model share: shapes, stacked Llama, optimizer."""
