"""What ``sgtriton demo`` runs: the whole job on real handwritten digits."""
