//! Rotation as a function: journal + instant -> the one next write. Whoever has the key generator and the home does it.
