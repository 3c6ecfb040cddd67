"""The paper, an equation a function: basis, POLCA, projected loss, clusters, breakthroughs."""
