"""HTTP: knows FastAPI and the engine; never torch, PIL or OpenVINO."""
