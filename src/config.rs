//! Text becomes settings once, at the door: flag, environment, file, embedded default, in this order.
