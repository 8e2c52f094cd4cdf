"""The codecs, one file for each kind; `fedmom.travel.table` names them."""
