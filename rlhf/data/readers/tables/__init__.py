"""Tables of texts (.csv, .tsv): their rows, and the lists and objects that their cells may hold."""
