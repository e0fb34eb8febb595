/* What systemd's PID 1 does with vmm.notify_socket=vsock-stream:2:PORT: sends a report over a connection of
 * its own, closes its half and waits until the other side has closed too.
 *
 *     report PORT TEXT */
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct sockaddr_vm host = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST };
    char byte;
    int fd;

    if (argc != 3)
        return 2;
    host.svm_port = strtoul(argv[1], NULL, 10);
    fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&host, sizeof(host)) < 0) {
        perror("vsock");
        return 1;
    }
    if (write(fd, argv[2], strlen(argv[2])) < 0 || shutdown(fd, SHUT_WR) < 0) {
        perror("report");
        return 1;
    }
    puts(read(fd, &byte, 1) == 0 ? "closed" : "not closed");
    return 0;
}
