"""The HTTP API and the camera page: one engine behind a queue that keeps deadlines."""
