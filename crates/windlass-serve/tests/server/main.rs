//! The server from outside, over real connections, with a tiny model of random weights.

mod adapters;
mod client;
mod faults;
mod house;
mod malformed;
mod shapes;
mod text;
mod tools;
