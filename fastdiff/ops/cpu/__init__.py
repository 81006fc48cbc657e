"""The C++ implementations of the ops: launchers with the signatures of the references, and the library behind them."""
