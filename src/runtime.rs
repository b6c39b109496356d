//! The process: owned tasks, shutdown, readiness, admin, telemetry.
