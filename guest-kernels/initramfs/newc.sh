# shellcheck shell=bash
# Sourced: writes an initramfs (cpio format newc, Documentation/driver-api/early-userspace/buffer-format.rst) to stdout.
# The cpio program would need root for device nodes and gives every run other inode numbers and times; this needs
# neither, and the same input gives the same bytes.
newc_inode=0

# newc NAME MODE [CONTENT_FILE [MAJOR MINOR]]: one entry; MODE is octal with the file type.
newc() {
    local name=$1 mode=$2 file=${3:-} size=0
    [ -z "$file" ] || size=$(stat -Lc %s "$file")
    newc_header "$name" "$mode" "$size" "${4:-0}" "${5:-0}"
    [ -z "$file" ] || { cat "$file"; newc_pad "$size"; }
}
newc_dir() { newc "$1" 040755; }
newc_file() { newc "$1" "${3:-0100755}" "$2"; }
newc_node() { newc "$1" "$2" '' "$3" "$4"; }
newc_link() { # NAME TARGET
    newc_header "$1" 0120777 ${#2} 0 0
    printf '%s' "$2"
    newc_pad ${#2}
}
newc_end() { newc_header 'TRAILER!!!' 0 0 0 0; }

newc_header() { # NAME MODE SIZE MAJOR MINOR
    newc_inode=$((newc_inode + 1))
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\0' \
        $newc_inode $(($2)) 0 0 1 0 "$3" 0 0 "$4" "$5" $((${#1} + 1)) 0 "$1"
    newc_pad $((110 + ${#1} + 1))
}
newc_pad() { # to a multiple of four
    case $((-$1 & 3)) in
        1) printf '\0' ;;
        2) printf '\0\0' ;;
        3) printf '\0\0\0' ;;
    esac
}
