"""Human feedback: the questions, the answers, and the page and terminal in which people give them."""
